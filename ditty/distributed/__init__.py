"""One model over several processes: DDP, FSDP2, ZeRO-3, and their optimizers."""
