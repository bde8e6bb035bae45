from moe_jax.commands import xla_flags

if __name__ == "__main__":
    xla_flags.main()
