"""Tests that start no Ray and take long: the rehearsal of CUDA, files and commands in processes of their own."""
