from moe_jax.commands import generate

if __name__ == "__main__":
    generate.main()
