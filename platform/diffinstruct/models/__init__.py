"""Pretrained pipelines of diffusers and transformers, their roles in the method, adapters, sharding, export."""
