"""Diffusion on numpy: prompts to latents to pictures. Knows no backend and no torch."""
