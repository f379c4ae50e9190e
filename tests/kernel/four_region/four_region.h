/* SPDX-License-Identifier: GPL-2.0 */
/*
 * A mediated device that speaks the four-region device-state interface of 2019 ("QEMU VFIO live migration"), which no
 * kernel ever shipped: what vfiostream is tested against where the kernel's VFIO is real. It behaves as the reference
 * device of src/vfiostream/vendor/ does, errnos included.
 *
 *	module.c	mdev types, their version attribute, life and death
 *	device.c	the VFIO side: infos, regions, mmap, PCI config space
 *	control.c	the control region and the device's state
 *	saving.c	captures: device memory and config on their way out
 *	loading.c	their way in
 *	engine.c	registers (BAR 2), DMA, and the workload that keeps memory changing
 */
#ifndef FOUR_REGION_H
#define FOUR_REGION_H

#include <linux/mdev.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/prandom.h>
#include <linux/sizes.h>
#include <linux/vfio.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

/* ---- the interface */

#define FR_REGION_TYPE		(1 << 1)
#define FR_INTERFACE_VERSION	1

enum fr_subtype { FR_CONTROL = 1, FR_CONFIG, FR_MEMORY, FR_BITMAP };
enum fr_action { FR_GET_BUFFER = 1, FR_SET_BUFFER };

#define FR_STATE_STOP		BIT(0)
#define FR_STATE_LOGGING	BIT(1)
#define FR_STATE_MASK		(FR_STATE_STOP | FR_STATE_LOGGING)

#define FR_CAP_DEVICE_MEMORY	BIT(0)
#define FR_CAP_SYSTEM_MEMORY	BIT(1)

/* Offsets of the control region's fields, where the natural and the packed layout differ. */
#define FR_CTL_VERSION		0
#define FR_CTL_STATE		4
#define FR_CTL_CAPS		8

struct fr_layout {
	u32 size, config_action, config_size, memory_action, memory_size, memory_pos, start_addr, page_nr;
};

/* vfiostream's own: the version attribute as a region of the vendor's type, for who can't see sysfs. */
#define FR_VENDOR		0x5653
#define FR_DEVICE		0x0002
#define FR_VERSION_TYPE		(VFIO_REGION_TYPE_PCI_VENDOR_TYPE | FR_VENDOR)
#define FR_VERSION_SUBTYPE	0x56465356
#define FR_VERSION_SIZE		4096

/* ---- regions: what PCI has, then ours */

enum fr_index {
	FR_INDEX_MEMORY_BAR = VFIO_PCI_BAR0_REGION_INDEX,	/* device memory */
	FR_INDEX_REGISTERS = VFIO_PCI_BAR2_REGION_INDEX,
	FR_INDEX_PCI_CONFIG = VFIO_PCI_CONFIG_REGION_INDEX,
	FR_INDEX_CONTROL = VFIO_PCI_NUM_REGIONS,
	FR_INDEX_CONFIG,
	FR_INDEX_MEMORY,
	FR_INDEX_BITMAP,
	FR_INDEX_VERSION,
	FR_NUM_REGIONS,
};

#define FR_OFFSET_SHIFT		40	/* a region's index in an offset of the device's file */

struct fr_region {
	u64 size;
	u32 flags;		/* VFIO_REGION_INFO_FLAG_* */
	u32 type, subtype;	/* 0: no such capability */
	u8 *data;		/* staging: what user space maps; else NULL */
	u32 nr_areas;		/* 0: all of it, if it can be mapped */
	struct vfio_region_sparse_mmap_area areas[2];
};

/* ---- registers, each of 8 bytes, in BAR 2. Beyond them it keeps what is written. All of it is the device's config. */

enum fr_register {
	FR_REG_ID = 0x00,	/* read only: FR_ID */
	FR_REG_IOVA = 0x08,	/* guest memory to work on, whole pages */
	FR_REG_LENGTH = 0x10,
	FR_REG_PATTERN = 0x18,	/* page n of a transfer is filled with this + n, as 64-bit words */
	FR_REG_OFFSET = 0x20,	/* where in device memory */
	FR_REG_KICK = 0x28,	/* write only: FR_KICK_*, done when the write returns */
	FR_REG_RATE = 0x30,	/* of the workload: pages a second, of each memory it works on */
	FR_REG_WORK = 0x38,	/* FR_WORK_*: what the workload writes to while the device runs */
	FR_REG_WRITTEN = 0x40,	/* read only: pages written so far */
	FR_REG_FAILED = 0x48,	/* read only: pages of the workload's that no guest memory was there for */
	FR_REG_STATE = 0x50,	/* read only: device_state */
};

#define FR_ID			0x4e475234	/* "4RGN" */
#define FR_KICK_GUEST		1	/* fill guest memory */
#define FR_KICK_TO_GUEST	2	/* copy device memory to guest memory */
#define FR_KICK_FROM_GUEST	3	/* copy guest memory to device memory */
#define FR_KICK_DEVICE		4	/* fill device memory */
#define FR_WORK_DEVICE		BIT(0)
#define FR_WORK_GUEST		BIT(1)

#define FR_SCRATCH		SZ_4K	/* where registers end */
#define FR_REGISTERS_SIZE	SZ_32K

/* ---- a type and a device of it */

enum fr_map { FR_MAP_WHOLE, FR_MAP_SPARSE, FR_MAP_NONE };

struct fr_type {
	struct mdev_type type;
	u64 memory;		/* bytes, a power of two of at least 256 KiB, or 0 */
	u64 memory_region, config_region, bitmap_region;	/* a capture's head fits the first */
	u32 caps;
	u32 generation;
	enum fr_map map;
	bool packed;
};

/*
 * A capture: this header, a bit for each page of device memory, zeros up to a whole page, and the pages whose bits are
 * set, in order. Numbers and bits are little endian, as the machine is. The pages have no checksum: they are read when
 * they are fetched, and whoever carries them checks what it carries.
 */
struct fr_head {
	u64 magic;
	u32 kind;	/* enum fr_kind */
	u32 ordinal;	/* 0 is the whole memory, dirty ones number on from it */
	u64 nonce;	/* which captures belong together */
	u64 memory;	/* bytes of device memory */
	u64 pages;	/* how many follow */
	u32 zero;
	u32 crc;	/* of header (with zero here) and bits */
};

enum fr_kind { FR_WHOLE = 1, FR_DIRTY };

/* A snapshot of the config: this header and the content of BAR 2. */
struct fr_config {
	u64 magic;
	u64 nonce;	/* of the captures that precede, and how many they are */
	u32 captures;
	u32 crc;	/* of header (with zero here) and content */
	u8 content[FR_REGISTERS_SIZE];
};

#define FR_HEAD_MAGIC		0x3144414548475234	/* "4RGHEAD1" */
#define FR_CONFIG_MAGIC		0x31464e4f43475234	/* "4RGCONF1" */

struct fr_saving {
	u64 nonce;
	u32 captures;			/* of the stream so far */
	u64 size;			/* of the last one; 0: there is none */
	struct fr_head *head;		/* head_size bytes: bits and padding follow */
	unsigned long *unfetched;	/* a bit for each chunk of the last capture */
};

struct fr_loading {
	bool begun;		/* until it is complete, the device stays in STOP */
	bool in_capture;	/* the last capture did not come to its end, or was refused */
	u64 nonce;
	u32 captures;
	u64 total, pos;		/* of the capture; equal: nothing is due */
	struct fr_head *head;
	unsigned long next_page;
};

struct fr_device {
	struct vfio_device vdev;	/* must come first */
	const struct fr_type *type;
	const struct fr_layout *layout;
	struct fr_region regions[FR_NUM_REGIONS];

	/* Guards all that follows, but dirty. Never taken where mmap_lock is held. */
	struct mutex lock;
	bool open;
	u32 state;
	u8 *memory;
	unsigned long pages;		/* of memory */
	u64 head_size;			/* of a capture */
	unsigned long *dirty;		/* a bit for each page written since it was captured; atomic bit operations */
	struct fr_saving saving;
	struct fr_loading loading;
	u64 memory_pos, start_addr;	/* as last written */
	u64 config_size;		/* as announced for loading; 0: was not */

	u8 *registers;
	u8 *page;			/* the engine's own buffer */
	struct delayed_work work;
	bool working;			/* work is queued or runs */
	ktime_t worked;			/* until when */
	struct rnd_state random;
	struct xarray guest_dirty;	/* bitmaps of a page each, by page number >> FR_GUEST_SHIFT */

	u8 pci[PCI_CFG_SPACE_SIZE], pci_writable[PCI_CFG_SPACE_SIZE];
};

#define FR_GUEST_SHIFT		(PAGE_SHIFT + 3)

static inline struct fr_device *to_fr(struct vfio_device *vdev)
{
	return container_of(vdev, struct fr_device, vdev);
}

static inline bool fr_logging(const struct fr_device *fr)
{
	return fr->state & FR_STATE_LOGGING;
}

static inline bool fr_running(const struct fr_device *fr)
{
	return !(fr->state & FR_STATE_STOP);
}

static inline unsigned long *fr_head_bits(struct fr_head *head)
{
	return (unsigned long *)(head + 1);
}

static inline u64 *fr_register(struct fr_device *fr, enum fr_register which)
{
	return (u64 *)(fr->registers + which);
}

static inline u64 fr_capture_size(const struct fr_device *fr, u64 pages)
{
	return fr->head_size + (pages << PAGE_SHIFT);
}

/* All but the first five are called with the lock held. Who returns int returns 0 or a negative errno. */
extern const struct vfio_device_ops fr_device_ops;
int fr_version_show(const struct fr_type *type, char *text, size_t size);
bool fr_version_accepts(const struct fr_type *type, const char *text, size_t size);
void fr_work(struct work_struct *work);
void fr_mark_memory(struct fr_device *fr, u64 offset, u64 count);

int fr_control_read(struct fr_device *fr, u64 offset, void *data, size_t count);
int fr_control_write(struct fr_device *fr, u64 offset, const void *data, size_t count);
void fr_reset(struct fr_device *fr);

void fr_forget_captures(struct fr_device *fr);
u64 fr_capture(struct fr_device *fr);
int fr_fetch(struct fr_device *fr);
void fr_get_config(struct fr_device *fr);
u32 fr_head_crc(const struct fr_device *fr, const struct fr_head *head);
u32 fr_config_crc(const struct fr_config *config);

int fr_begin_capture(struct fr_device *fr, u64 size);
int fr_take(struct fr_device *fr);
int fr_set_config(struct fr_device *fr);

int fr_register_write(struct fr_device *fr, u64 offset, const void *data, size_t count);
void fr_registers_read(struct fr_device *fr, u64 offset, void *data, size_t count);
void fr_work_if_due(struct fr_device *fr);
void fr_forget_guest(struct fr_device *fr);
void fr_forget_guest_range(struct fr_device *fr, u64 iova, u64 length);
void fr_take_guest_dirty(struct fr_device *fr, u64 first, u64 pages, void *bitmap);

#endif
