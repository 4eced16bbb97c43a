"""Training of the embedded model, in stages; needs the extras `export` (torch, diffusers) and `train` (peft). See `demo/README.md`."""
