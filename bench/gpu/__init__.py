"""The bench on a GPU: our engine beside transformers' compiled decode and the limit of the GPU's memory."""
