"""ONNX models as torch modules: the loader, the graph, the operators."""
