"""What tests share: definitions, devices, interpreters and checks."""
