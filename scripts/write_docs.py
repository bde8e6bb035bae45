from moe_jax.commands import write_docs

if __name__ == "__main__":
    write_docs.main()
