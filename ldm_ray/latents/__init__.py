"""Looking at a latent space: paths and planes through it, maps of it."""
