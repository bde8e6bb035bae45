from moe_jax.commands import recipes

if __name__ == "__main__":
    recipes.main()
