"""Code that runs at a client."""
