"""The paper: objectives, distances, diffusion, guidance, rewards at the latents, the alternating step; torch only."""
