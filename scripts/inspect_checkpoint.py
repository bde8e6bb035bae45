from moe_jax.commands import inspect_checkpoint

if __name__ == "__main__":
    inspect_checkpoint.main()
