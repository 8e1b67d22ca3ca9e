"""An engine bundle becomes tokens. Needs numpy, onnxruntime, tokenizers, zmq; nothing of `export` or `server`."""
