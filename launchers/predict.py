"""What a fine-tuned model says of new sequences."""


from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.predict import main
    from hyena_dist.runtime.launcher import leave

    status = main()
    if status:
        leave(status)  # a rank that failed does not wait for its peers
