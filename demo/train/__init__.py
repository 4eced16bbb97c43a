"""Training of the embedded model, in stages; needs the `export` extra (torch, diffusers). See `demo/README.md`."""
