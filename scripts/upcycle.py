from moe_jax.commands import upcycle

if __name__ == "__main__":
    upcycle.main()
