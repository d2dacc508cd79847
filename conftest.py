"""Which modules pytest reads: a bridge alone where what it leads to is installed."""

from importlib.util import find_spec

BRIDGES = ("dask", "jax", "onnx", "torch")
collect_ignore_glob = [f"pydeform/{name}{end}" for name in BRIDGES if find_spec(name) is None for end in (".py", "/*")]
