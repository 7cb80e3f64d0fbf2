"""The PEFT method: its config, its layers in the model, the supported backbones, saved weights, mixed batches."""
