"""The HTTP service: ``serve run serve.app:deployment`` from the project's root. Not part of the wheel."""
