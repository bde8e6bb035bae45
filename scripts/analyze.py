from moe_jax.commands import analyze

if __name__ == "__main__":
    analyze.main()
