"""How good the images are: feature extractor, Fréchet distance, precision/recall, floors. No Ray in here."""
