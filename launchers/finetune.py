"""Fine-tune a pretrained model on labelled sequences: what deepspeed, torchrun, srun and plain python start."""

from hyena_dist.runtime.signals import PROCESS

if __name__ == "__main__":
    PROCESS.install()  # before the other imports, which take seconds
    from hyena_dist.cli.finetune import main
    from hyena_dist.runtime.launcher import leave

    status = main()
    if status:
        leave(status)
