"""A difference or a model as a page that people click through: groups, positions, and the page itself."""
