from moe_jax.commands import sweep

if __name__ == "__main__":
    sweep.main()
