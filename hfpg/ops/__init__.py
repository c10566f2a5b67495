"""The paper: every equation as a small pure function. Tensors in and out; no module, config, device, collective."""
