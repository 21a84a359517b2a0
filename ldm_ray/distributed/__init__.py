"""The only part of ldm_ray that imports Ray. It holds no mathematics."""
