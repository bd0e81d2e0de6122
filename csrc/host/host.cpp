// The version of the library, raised together with ABI_VERSION in megaflow/data/native.py at every change of a signature.

extern "C" int megaflow_abi_version() { return 4; }
