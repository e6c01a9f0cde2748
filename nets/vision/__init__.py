"""Networks that see: ViT, Swin and what they share."""
