from .pipeline import main

# A module of its own: processes that are spawned import what they run by name, and this file has none.
if __name__ == "__main__":
    main()
