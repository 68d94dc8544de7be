"""What a rewritten model needs when it runs; usable without the compiler."""
