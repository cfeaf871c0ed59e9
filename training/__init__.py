"""Losses, LoRA, data and helpers of training."""
