"""Pure PyTorch decoding over a Hugging Face causal LM, on CPU and GPU."""
