"""Train HyenaDNA, genomic language models of long implicit convolutions, with DeepSpeed, FSDP2 and megatron-core."""
