from moe_jax.commands import convert

if __name__ == "__main__":
    convert.main()
