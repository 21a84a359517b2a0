"""From seeds and labels to images, alone or in company."""
