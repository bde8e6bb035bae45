from moe_jax.commands import dryrun

if __name__ == "__main__":
    dryrun.main()
