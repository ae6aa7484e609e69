"""What a program is: captured graphs, the facts known about them, and the rules they obey."""
