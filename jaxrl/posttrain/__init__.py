"""Post-training of language models: samplers, rewards and pure steps."""
