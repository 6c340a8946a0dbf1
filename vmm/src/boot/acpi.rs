//! The ACPI tables: what a kernel cannot find by trying.
//!
//! They describe the board of `hindsight-devices`: one processor with a local APIC, an I/O APIC, two
//! 8259s, the fixed hardware of ACPI, and in the DSDT the devices that nothing else enumerates. There
//! is no PCI root, no keyboard controller, no VGA, no system-management mode, and no object for the
//! processor, whose only idle state is HLT. Where each thing is, the tables have from the board's own
//! wiring.
//!
//! All of it stands in the BIOS area, RSDP first, where kernels that ignore the zero page's pointer
//! look for it (ACPI 6.5, 5.2.5.1).

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope,
};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use hindsight_devices::acpi::SLEEP_TYPE_OFF;
use hindsight_devices::wiring::{
    CLOCK, CLOCK_CENTURY, CONSOLE, IO_APIC, IsaDevice, LOCAL_APIC, POWER, Ports, RESET_CONTROL,
    Slot, TIMER_GSI, TIMER_IRQ,
};

use super::layout::{ACPI_TABLES, ACPI_TABLES_BYTES};

const OEM: [u8; 6] = *b"HNDSGT";
const OEM_TABLE: [u8; 8] = *b"HNDSGHT1";
const OEM_REVISION: u32 = 1;

/// Flags of an interrupt source override: as the ISA bus has it; active high and level-triggered
/// (ACPI 6.5, table 5.26).
const AS_ON_ISA: u16 = 0;
const LEVEL_HIGH: u16 = 0b1101;
/// MADT flag: there are two 8259s.
const PCAT_COMPAT: u32 = 1;

/// IA-PC boot architecture: there are devices on an ISA bus (bit 0), no 8042 (bit 1), no VGA (bit 2),
/// no MSI (bit 3), a CMOS clock (bit 5) (ACPI 6.5, table 5.11).
const BOOT_ARCHITECTURE: u16 = 1 << 0 | 1 << 2 | 1 << 3;
/// Latencies that say that there is no C2 and no C3 (ACPI 6.5, 5.2.9).
const NO_C2: u16 = 101;
const NO_C3: u16 = 1001;
/// What to write to the reset control register: a hard reset.
const RESET_VALUE: u8 = 0x06;

/// The tables as they stand at [`ACPI_TABLES`], where the RSDP comes first.
pub(super) fn tables(slots: &[Slot]) -> Vec<u8> {
    let mut area = Area {
        bytes: vec![0; Rsdp::len()],
    };
    // The FACS wants 64 bytes to begin at; all others get them too.
    let facs = area.place(&FACS::new());
    let dsdt = area.place(&dsdt(slots));
    let fadt = area.place(&fadt(facs, dsdt));
    let madt = area.place(&madt());
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt.into());
    xsdt.add_entry(madt.into());
    let xsdt = area.place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt.into()).to_aml_bytes(&mut rsdp);
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    assert!(
        area.bytes.len() as u64 <= ACPI_TABLES_BYTES,
        "{} bytes of ACPI tables, room for {ACPI_TABLES_BYTES}",
        area.bytes.len()
    );
    area.bytes
}

/// Tables one after the other.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Adds a table and returns its address.
    fn place(&mut self, table: &dyn Aml) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        let at = ACPI_TABLES as u32 + self.bytes.len() as u32;
        table.to_aml_bytes(&mut self.bytes);
        at
    }
}

/// Fixed hardware (ACPI 6.5, 5.2.9).
fn fadt(facs: u32, dsdt: u32) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .firmware_ctrl_32(facs)
        .dsdt_32(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton) // set: there is none; the power button's is clear: there is one
        .flag(Flags::FixRtc) // likewise: the clock does not wake the machine
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = u16::from(POWER.gsi).into();
    fadt.pm1a_evt_blk = u32::from(POWER.event.first).into();
    fadt.pm1_evt_len = count(POWER.event);
    fadt.pm1a_cnt_blk = u32::from(POWER.control.first).into();
    fadt.pm1_cnt_len = count(POWER.control);
    fadt.pm_tmr_blk = u32::from(POWER.timer.first).into();
    fadt.pm_tmr_len = count(POWER.timer);
    fadt.p_lvl2_lat = NO_C2.into();
    fadt.p_lvl3_lat = NO_C3.into();
    fadt.century = CLOCK_CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCHITECTURE.into();
    fadt.reset_reg = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        RESET_CONTROL.first.into(),
    );
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// Interrupt controllers (ACPI 6.5, 5.2.12). The crate's own table of this name cannot say that
/// there are 8259s.
fn madt() -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, OEM_REVISION);
    madt.dword(low(LOCAL_APIC.gpa));
    madt.dword(PCAT_COMPAT);
    ProcessorLocalApic::new(0, 0, EnabledStatus::Enabled).to_aml_bytes(&mut madt);
    IoApic::new(0, low(IO_APIC.gpa), 0).to_aml_bytes(&mut madt);
    let timer = (TIMER_IRQ, TIMER_GSI, AS_ON_ISA);
    let sci = (POWER.gsi, POWER.gsi, LEVEL_HIGH);
    for (source, gsi, flags) in [timer, sci] {
        madt.vec(&[2, 10, 0, source]); // an interrupt source override of the ISA bus
        madt.dword(gsi.into());
        madt.word(flags);
    }
    madt
}

/// Devices and the soft-off state.
fn dsdt(slots: &[Slot]) -> Sdt {
    let console = Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &1_u8),
            &isa_resources(CONSOLE),
        ],
    )
    .bytes();
    let clock = Device::new(
        "RTC0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &isa_resources(CLOCK),
        ],
    )
    .bytes();
    let mut devices = vec![console, clock];
    devices.extend(slots.iter().enumerate().map(virtio));
    let devices: Vec<&dyn Aml> = devices.iter().map(|device| device as &dyn Aml).collect();

    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
    Scope::new("_SB_".into(), devices).to_aml_bytes(&mut dsdt);
    let off = Package::new(vec![&SLEEP_TYPE_OFF, &0_u8, &0_u8, &0_u8]);
    Name::new("_S5_".into(), &off).to_aml_bytes(&mut dsdt);
    dsdt
}

/// Virtio over MMIO, by the name that Linux knows it under.
fn virtio((index, slot): (usize, &Slot)) -> Bytes {
    let window = Memory32Fixed::new(true, low(slot.gpa), low(slot.bytes));
    let interrupt = Interrupt::new(true, false, false, false, slot.gsi.into());
    Device::new(
        format!("VIO{index:X}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(index as u8)),
            // Its accesses to memory are coherent with the processor's.
            &Name::new("_CCA".into(), &1_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&window, &interrupt]),
            ),
        ],
    )
    .bytes()
}

/// The ports and the interrupt of a device: an edge, active high.
fn isa_resources(device: IsaDevice) -> Name {
    let ports = device.ports;
    let ports = IO::new(ports.first, ports.first, 1, count(ports));
    let interrupt = Interrupt::new(true, true, false, false, device.gsi.into());
    Name::new(
        "_CRS".into(),
        &ResourceTemplate::new(vec![&ports, &interrupt]),
    )
}

/// The length of a block of ports, as the tables have it.
fn count(ports: Ports) -> u8 {
    u8::try_from(ports.count).expect("a device has few ports")
}

/// An address as a table has it that knows no others.
fn low(address: u64) -> u32 {
    u32::try_from(address).expect("the devices stand below 4 GiB")
}

/// AML as it is.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Objects hold references to their parts; their bytes do not.
trait IntoBytes {
    fn bytes(&self) -> Bytes;
}

impl<T: Aml> IntoBytes for T {
    fn bytes(&self) -> Bytes {
        let mut bytes = Vec::new();
        self.to_aml_bytes(&mut bytes);
        Bytes(bytes)
    }
}

#[cfg(test)]
mod tests;
