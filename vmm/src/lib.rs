//! The shell around the machine: KVM, boot, trap ports, the live world, and the command line.
