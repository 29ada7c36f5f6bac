"""The backend in Triton."""
