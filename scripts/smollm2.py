from moe_jax.commands import smollm2

if __name__ == "__main__":
    smollm2.main()
