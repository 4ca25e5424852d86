"""Look at the machines of a run before it is started: what deepspeed, torchrun, srun and plain python start."""

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()
    from hyena_dist.cli.doctor import main
    from hyena_dist.runtime.launcher import leave

    leave(main())
