"""Modules that import another library are collected where it is installed."""

from importlib.util import find_spec

LIBRARIES = ("torch", "jax", "onnx", "dask")  # pydeform/NAME is the bridge to NAME
collect_ignore_glob = [f"pydeform/{name}*" for name in LIBRARIES if find_spec(name) is None]
