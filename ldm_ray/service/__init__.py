"""What the HTTP service is made of; serve/app.py runs it on Ray Serve."""
