"""Who holds gradients and optimizer state: DeepSpeed and FSDP2 behind one protocol. Gets blocks and the placement
table as arguments, and never imports the model."""
