"""An engine bundle becomes tokens. Needs numpy, onnxruntime, tokenizers, zmq; nothing of `export` or `server`."""

import os

# ONNX Runtime's wheels report usage to their maker unless told not to before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
