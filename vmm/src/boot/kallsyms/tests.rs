use super::*;

#[test]
fn debians_kernels_name_their_functions() {
    for (path, image) in super::super::testing::debian_kernels() {
        let kernel = super::super::unpack(&image).unwrap();
        let started = std::time::Instant::now();
        let symbols = Symbols::find(&kernel.elf).expect(&path);
        eprintln!("{path}: {} symbols, {:?}", symbols.count(), started.elapsed());
        for n in ["_text","startup_64","load_module","module_enable_x","do_init_module","module_enable_ro","ftrace_module_init","module_finalize","__start_BTF", "__stop_BTF","pcpu_hot","current_task"] {
            eprintln!("{n} {:x?}", symbols.lookup(n));
        }
    }
}
