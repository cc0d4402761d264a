"""TensorFlow Lite models (.tflite): read as data, and built of torch layers."""
