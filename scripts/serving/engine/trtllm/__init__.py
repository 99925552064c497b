"""The adapter for TensorRT-LLM, whole in this folder.

engine.py      one worker's engine: start, load report, health, close
library.py     the import of the library, and its `LLM`
requests/      a request on its way through the library
reports/       KV events and statistics of the library, translated
build/         what an engine folder is made of; runs without importing the library
"""
