BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0008');
CREATE TABLE artifact (
	digest VARCHAR(64) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	runtime VARCHAR NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "artifact" VALUES('13b33d08726b2e90e46c5f83555c13167cfa94fcf3b549eb17d2f2094f0d660f',29,'3.13.0','2026-11-21T16:42:08.329+00:00');
INSERT INTO "artifact" VALUES('926f4b36e0793e2b4a74a9c9514491aa975cda42068bd51b7ca5a80746df4293',26,'3.13.0','2026-11-21T16:42:08.364+00:00');
INSERT INTO "artifact" VALUES('41b72e78d363b09d8089106a46e753ee7e93f7d2af014378e3fea46277b611c6',27,'3.13.0','2026-11-21T16:42:08.377+00:00');
CREATE TABLE build (
	"key" VARCHAR(64) NOT NULL, 
	model VARCHAR(64) NOT NULL, 
	scope VARCHAR(64) NOT NULL, 
	inputs JSON NOT NULL, 
	seconds DOUBLE NOT NULL, 
	raced BOOLEAN NOT NULL, 
	ended VARCHAR NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "build" VALUES('34851f0c87cfe9bd6fbb2a93281964f9afba94580b778155cfaab4b3622611c9','m','d4fd10f8cd48989afe21371f7d16813c5449b825bf4c7ef26c4ea75f44aed07f','{"model": "m"}',1.0,1,'done','2026-11-21T16:42:08.387+00:00');
CREATE TABLE collected (
	digest VARCHAR(64) NOT NULL, 
	size_bytes BIGINT NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY (digest)
);
CREATE TABLE compile (
	"key" VARCHAR(64) NOT NULL, 
	inputs JSON NOT NULL, 
	artifact VARCHAR(64) NOT NULL, 
	seconds DOUBLE NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY ("key"), 
	FOREIGN KEY(artifact) REFERENCES artifact (digest)
);
INSERT INTO "compile" VALUES('e1ef0f3fee0ee392fd2eda1f624bbee2191641b070e09a6bde208076d65c4e53','{"name": "default"}','13b33d08726b2e90e46c5f83555c13167cfa94fcf3b549eb17d2f2094f0d660f',0.1,'2026-11-21T16:42:08.330+00:00');
INSERT INTO "compile" VALUES('c1b1a72f4f5e5c733c2261207f849c9f604f8d22d0f68fbb1f6de10ab5160c63','{"name": "fast"}','926f4b36e0793e2b4a74a9c9514491aa975cda42068bd51b7ca5a80746df4293',0.1,'2026-11-21T16:42:08.365+00:00');
INSERT INTO "compile" VALUES('b68d421d18949da04faa452de86d1ec17a18d55dcea29daf7c8e190e4ebd2ca3','{"name": "small"}','41b72e78d363b09d8089106a46e753ee7e93f7d2af014378e3fea46277b611c6',0.1,'2026-11-21T16:42:08.377+00:00');
CREATE TABLE dispatch_tuning (
	"key" VARCHAR(64) NOT NULL, 
	inputs JSON NOT NULL, 
	configuration TEXT NOT NULL, 
	gain FLOAT NOT NULL, 
	tried JSON NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY ("key")
);
CREATE TABLE failure (
	id INTEGER NOT NULL, 
	model VARCHAR NOT NULL, 
	variant VARCHAR(64), 
	stage VARCHAR(16) NOT NULL, 
	reason TEXT NOT NULL, 
	command TEXT NOT NULL, 
	log TEXT NOT NULL, 
	lasting BOOLEAN NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE front_half (
	"key" VARCHAR(64) NOT NULL, 
	inputs JSON NOT NULL, 
	blob VARCHAR(64) NOT NULL, 
	features JSON NOT NULL, 
	seconds DOUBLE NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY ("key")
);
CREATE TABLE import (
	"key" VARCHAR(64) NOT NULL, 
	inputs JSON NOT NULL, 
	program VARCHAR(64) NOT NULL, 
	seconds DOUBLE NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY ("key"), 
	FOREIGN KEY(program) REFERENCES program (digest)
);
INSERT INTO "import" VALUES('86462007f076ba46758f880de3e44e4e7c57be7d28aa514aceea877139ce363c','{"model": "m"}','f64692443333545038b5e1df1541a604160341c1d61249954808a4f501b80742',0.1,'2026-11-21T16:42:08.362+00:00');
INSERT INTO "import" VALUES('2c901270b216112cba12f2a4092eea8706c28cc7f2d4a0edadfd0278bdba83b6','{"model": "m"}','2b2192a2f1dd63883ed795efff02517d865db84c7d4c564011b4139c961dafbb',0.1,'2026-11-21T16:42:08.374+00:00');
CREATE TABLE info (
	id INTEGER NOT NULL, 
	schema_version INTEGER NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY (id)
);
INSERT INTO "info" VALUES(1,8,'2026-11-29T03:05:43.130+00:00');
CREATE TABLE load_curve (
	"key" VARCHAR(64) NOT NULL, 
	variant VARCHAR(64) NOT NULL, 
	artifact VARCHAR(64) NOT NULL, 
	machine VARCHAR(64) NOT NULL, 
	driver VARCHAR NOT NULL, 
	workers INTEGER NOT NULL, 
	context INTEGER NOT NULL, 
	decodes_most INTEGER NOT NULL, 
	prompt_most INTEGER NOT NULL, 
	held_out INTEGER NOT NULL, 
	decode_s DOUBLE NOT NULL, 
	decodes_s DOUBLE NOT NULL, 
	prompt_s DOUBLE NOT NULL, 
	turn_s DOUBLE NOT NULL, 
	row_s DOUBLE NOT NULL, 
	error_p95 DOUBLE NOT NULL, 
	decode_j DOUBLE, 
	decodes_j DOUBLE, 
	prompt_j DOUBLE, 
	energy_source VARCHAR, 
	body JSON NOT NULL, 
	protocol INTEGER NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY ("key"), 
	FOREIGN KEY(variant) REFERENCES variant (digest), 
	FOREIGN KEY(artifact) REFERENCES artifact (digest), 
	FOREIGN KEY(machine) REFERENCES machine (digest)
);
CREATE TABLE machine (
	digest VARCHAR(64) NOT NULL, 
	name VARCHAR NOT NULL, 
	body JSON NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "machine" VALUES('0f47ebeb15323b34bec8a129a798515e4f80cf28223d7e45462e619d6817fedb','AMD EPYC (family 26 model 2), 2 cores, 24 GiB, Linux 6.18.44-fc-v657, VM (unnamed)','{"chip": "AMD EPYC (family 26 model 2)", "arch": "x86_64", "cores": 2, "memory_gib": 24, "system": "Linux 6.18.44-fc-v657", "hypervisor": "unnamed", "governor": "", "runtime": "3.13.0", "features": ["adx", "aes", "apic", "arat", "avx", "avx2", "avx512bf16", "avx512bitalg", "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512vl", "avx512vnni", "avx512vp2intersect", "avx512vpopcntdq", "avxvnni", "bmi", "bmi2", "clflush", "clflushopt", "clwb", "clzero", "cmov", "cmp_legacy", "constant_tsc", "cpuid", "cr8_legacy", "cx16", "cx8", "de", "erms", "extd_apicid", "f16c", "fma", "fpu", "fsgsbase", "fsrm", "fxsr", "fxsr_opt", "gfni", "ht", "hypervisor", "invpcid", "lm", "lzcnt", "mca", "mce", "misalignsse", "mmx", "mmxext", "movbe", "msr", "mtrr", "nonstop_tsc", "nopl", "nx", "osvw", "pae", "pat", "pcid", "pclmul", "pdpe1gb", "pge", "popcnt", "prfchw", "pse", "pse36", "rdpid", "rdrnd", "rdtscp", "rep_good", "sahf", "sep", "sha", "smap", "smep", "sse", "sse2", "sse3", "sse4.1", "sse4.2", "sse4a", "ssse3", "syscall", "topoext", "tsc", "tsc_adjust", "tsc_deadline_timer", "tsc_known_freq", "umip", "vaes", "vme", "vmmcall", "vpclmulqdq", "x2apic", "xgetbv1", "xsave", "xsavec", "xsaveerptr", "xsaveopt", "xsaves", "xtopology"]}');
CREATE TABLE machine_limit (
	machine VARCHAR(64) NOT NULL, 
	body JSON NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY (machine), 
	FOREIGN KEY(machine) REFERENCES machine (digest)
);
CREATE TABLE measurement (
	"key" VARCHAR(64) NOT NULL, 
	scope VARCHAR(64) NOT NULL, 
	variant VARCHAR(64) NOT NULL, 
	artifact VARCHAR(64) NOT NULL, 
	machine VARCHAR(64) NOT NULL, 
	workload VARCHAR(64) NOT NULL, 
	workload_body JSON NOT NULL, 
	protocol INTEGER NOT NULL, 
	ttft_s FLOAT, 
	tpot_s FLOAT, 
	e2e_s FLOAT, 
	output_tokens_per_s FLOAT, 
	energy_j_per_token FLOAT, 
	energy_source VARCHAR, 
	peak_memory_bytes BIGINT, 
	load_s FLOAT, 
	quality_kl FLOAT, 
	quality_top1 FLOAT, 
	quality_perplexity FLOAT, 
	dispatches_per_token FLOAT, 
	bandwidth_fraction FLOAT, 
	peak_fraction FLOAT, 
	operators JSON NOT NULL, 
	intervals JSON NOT NULL, 
	ratios JSON NOT NULL, 
	samples JSON NOT NULL, 
	notes JSON NOT NULL, 
	created_at VARCHAR NOT NULL, session VARCHAR, energy JSON, itl_p99_s FLOAT, 
	PRIMARY KEY ("key"), 
	FOREIGN KEY(artifact) REFERENCES artifact (digest), 
	FOREIGN KEY(machine) REFERENCES machine (digest), 
	FOREIGN KEY(variant) REFERENCES variant (digest)
);
INSERT INTO "measurement" VALUES('f8d9310a625ae4d91be1ef8ee4dd40de2d35e0f8443985881a00bfde447a2bda','d4fd10f8cd48989afe21371f7d16813c5449b825bf4c7ef26c4ea75f44aed07f','4780acad8be3bd480b8aeda2752f1bb0746a2156a7a157cf299ba9080923df18','13b33d08726b2e90e46c5f83555c13167cfa94fcf3b549eb17d2f2094f0d660f','0f47ebeb15323b34bec8a129a798515e4f80cf28223d7e45462e619d6817fedb','short','{"name": "short", "prompt": 8, "output": 8, "context": 32, "batch": 1, "seed": 0}',1,0.2,0.02,0.34,50.0,NULL,NULL,1000000,0.001,0.0,1.0,NULL,NULL,NULL,NULL,'[]','{"tpot_s": [0.0198, 0.0202], "ttft_s": [0.198, 0.202], "e2e_s": [0.3366, 0.34340000000000004], "output_tokens_per_s": [49.5, 50.5], "peak_memory_bytes": [1000000.0, 1000000.0], "load_s": [0.00099, 0.00101], "quality_kl": [0.0, 0.0], "quality_top1": [1.0, 1.0]}','{"tpot_s": [1.0, 1.0, 1.0]}','{"tpot_s": [0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02], "ttft_s": [0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2], "e2e_s": [0.34, 0.34, 0.34, 0.34, 0.34, 0.34, 0.34, 0.34, 0.34, 0.34], "output_tokens_per_s": [50.0, 50.0, 50.0, 50.0, 50.0, 50.0, 50.0, 50.0, 50.0, 50.0], "peak_memory_bytes": [1000000.0], "load_s": [0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001], "quality_kl": [0.0], "quality_top1": [1.0]}','{"energy": "no energy counter"}','2026-11-21T16:42:08.340+00:00',NULL,NULL,NULL);
INSERT INTO "measurement" VALUES('46f478aa81f02f948525072b663aac24227a9e08cc3ff58d05a3c7a31cfd87be','d4fd10f8cd48989afe21371f7d16813c5449b825bf4c7ef26c4ea75f44aed07f','cb348ecaa12e0fb9d3a24f740e9ab11b8f6876014741ef9a6ed36691ea7652c6','926f4b36e0793e2b4a74a9c9514491aa975cda42068bd51b7ca5a80746df4293','0f47ebeb15323b34bec8a129a798515e4f80cf28223d7e45462e619d6817fedb','short','{"name": "short", "prompt": 8, "output": 8, "context": 32, "batch": 1, "seed": 0}',1,0.3,0.01,0.37,100.0,NULL,NULL,1000000,0.001,0.0,1.0,NULL,NULL,NULL,NULL,'[]','{"tpot_s": [0.0099, 0.0101], "ttft_s": [0.297, 0.303], "e2e_s": [0.3663, 0.3737], "output_tokens_per_s": [99.0, 101.0], "peak_memory_bytes": [1000000.0, 1000000.0], "load_s": [0.00099, 0.00101], "quality_kl": [0.0, 0.0], "quality_top1": [1.0, 1.0]}','{"tpot_s": [1.0, 1.0, 1.0]}','{"tpot_s": [0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01, 0.01], "ttft_s": [0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3], "e2e_s": [0.37, 0.37, 0.37, 0.37, 0.37, 0.37, 0.37, 0.37, 0.37, 0.37], "output_tokens_per_s": [100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0, 100.0], "peak_memory_bytes": [1000000.0], "load_s": [0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001], "quality_kl": [0.0], "quality_top1": [1.0]}','{"energy": "no energy counter"}','2026-11-21T16:42:08.367+00:00',NULL,NULL,NULL);
INSERT INTO "measurement" VALUES('133bcdd17dabb503077c51227ddbda1e8c34f87f497c88e0823a4b650338d062','d4fd10f8cd48989afe21371f7d16813c5449b825bf4c7ef26c4ea75f44aed07f','dfecfc69d04e3cb7c16b1edb30db29ef7b7aa595ee91ccd37440b4fd5d1d095f','41b72e78d363b09d8089106a46e753ee7e93f7d2af014378e3fea46277b611c6','0f47ebeb15323b34bec8a129a798515e4f80cf28223d7e45462e619d6817fedb','short','{"name": "short", "prompt": 8, "output": 8, "context": 32, "batch": 1, "seed": 0}',1,0.1,0.015,2.05000000000000015543e-01,6.66666666666666714053e+01,NULL,NULL,1000000,0.001,0.0,1.0,NULL,NULL,NULL,NULL,'[]','{"tpot_s": [0.014849999999999999, 0.01515], "ttft_s": [0.099, 0.101], "e2e_s": [0.20295000000000002, 0.20705], "output_tokens_per_s": [66.0, 67.33333333333334], "peak_memory_bytes": [1000000.0, 1000000.0], "load_s": [0.00099, 0.00101], "quality_kl": [0.0, 0.0], "quality_top1": [1.0, 1.0]}','{"tpot_s": [1.0, 1.0, 1.0]}','{"tpot_s": [0.015, 0.015, 0.015, 0.015, 0.015, 0.015, 0.015, 0.015, 0.015, 0.015], "ttft_s": [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], "e2e_s": [0.20500000000000002, 0.20500000000000002, 0.20500000000000002, 0.20500000000000002, 0.20500000000000002, 0.20500000000000002, 0.20500000000000002, 0.20500000000000002, 0.20500000000000002, 0.20500000000000002], "output_tokens_per_s": [66.66666666666667, 66.66666666666667, 66.66666666666667, 66.66666666666667, 66.66666666666667, 66.66666666666667, 66.66666666666667, 66.66666666666667, 66.66666666666667, 66.66666666666667], "peak_memory_bytes": [1000000.0], "load_s": [0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001, 0.001], "quality_kl": [0.0], "quality_top1": [1.0]}','{"energy": "no energy counter"}','2026-11-21T16:42:08.379+00:00',NULL,NULL,NULL);
CREATE TABLE program (
	digest VARCHAR(64) NOT NULL, 
	module VARCHAR(64) NOT NULL, 
	parameters VARCHAR(64) NOT NULL, 
	checks VARCHAR(64) NOT NULL, 
	parameter_bytes BIGINT NOT NULL, 
	abi JSON NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "program" VALUES('f64692443333545038b5e1df1541a604160341c1d61249954808a4f501b80742','b3026fc82db68a55d590ed98be96303b0f92836a0514ab2dddcbbb017cd2a853','9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c','961f787b0cd3443fbc7c456886ecd25749c0485c4ae9a02f10599b17dad9f944',7,'{"vocabulary": 320, "context": 32, "kv": [], "eos_tokens": [], "parameters": 10, "required_features": []}');
INSERT INTO "program" VALUES('2b2192a2f1dd63883ed795efff02517d865db84c7d4c564011b4139c961dafbb','7c8aebf508a527fb5e30eadaa25b8bd068ad142d2de27a5acbcac6065559a8e3','e1ad2936d88e487947b9351c5bfb2192d9fb6b20bd9b2c6faf171dfa26f4a13c','961f787b0cd3443fbc7c456886ecd25749c0485c4ae9a02f10599b17dad9f944',13,'{"vocabulary": 320, "context": 32, "kv": [], "eos_tokens": [], "parameters": 10, "required_features": []}');
CREATE TABLE reference (
	"key" VARCHAR(64) NOT NULL, 
	blob VARCHAR(64) NOT NULL, 
	inputs JSON NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY ("key")
);
CREATE TABLE standing (
	id INTEGER NOT NULL, 
	model VARCHAR(64) NOT NULL, 
	target VARCHAR(64) NOT NULL, 
	machine VARCHAR(64) NOT NULL, 
	workload VARCHAR(64) NOT NULL, 
	variant VARCHAR(64) NOT NULL, 
	measurement VARCHAR(64), 
	failure INTEGER, 
	status VARCHAR(16) NOT NULL, 
	confidence FLOAT, 
	reason TEXT NOT NULL, ranking VARCHAR(64), source VARCHAR(64), tokenizer VARCHAR(64), chat VARCHAR(64), 
	PRIMARY KEY (id), 
	FOREIGN KEY(failure) REFERENCES failure (id), 
	FOREIGN KEY(machine) REFERENCES machine (digest), 
	FOREIGN KEY(measurement) REFERENCES measurement ("key"), 
	FOREIGN KEY(target) REFERENCES target (digest), 
	FOREIGN KEY(variant) REFERENCES variant (digest), 
	UNIQUE (model, target, machine, workload, variant)
);
INSERT INTO "standing" VALUES(1,'m','437213080877549397871d8446c0c7d6da695c585903548a575b7220fe34da6a','0f47ebeb15323b34bec8a129a798515e4f80cf28223d7e45462e619d6817fedb','short','4780acad8be3bd480b8aeda2752f1bb0746a2156a7a157cf299ba9080923df18','f8d9310a625ae4d91be1ef8ee4dd40de2d35e0f8443985881a00bfde447a2bda',NULL,'dominated',NULL,'beaten',NULL,NULL,NULL,NULL);
INSERT INTO "standing" VALUES(2,'m','437213080877549397871d8446c0c7d6da695c585903548a575b7220fe34da6a','0f47ebeb15323b34bec8a129a798515e4f80cf28223d7e45462e619d6817fedb','short','cb348ecaa12e0fb9d3a24f740e9ab11b8f6876014741ef9a6ed36691ea7652c6','46f478aa81f02f948525072b663aac24227a9e08cc3ff58d05a3c7a31cfd87be',NULL,'pareto',NULL,'',NULL,NULL,NULL,NULL);
INSERT INTO "standing" VALUES(3,'m','437213080877549397871d8446c0c7d6da695c585903548a575b7220fe34da6a','0f47ebeb15323b34bec8a129a798515e4f80cf28223d7e45462e619d6817fedb','short','dfecfc69d04e3cb7c16b1edb30db29ef7b7aa595ee91ccd37440b4fd5d1d095f','133bcdd17dabb503077c51227ddbda1e8c34f87f497c88e0823a4b650338d062',NULL,'undecided',NULL,'',NULL,NULL,NULL,NULL);
CREATE TABLE target (
	digest VARCHAR(64) NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	body JSON NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "target" VALUES('437213080877549397871d8446c0c7d6da695c585903548a575b7220fe34da6a','host','{"name": "host", "backend": "llvm-cpu", "arch": "x86_64", "cpu": "generic", "features": [], "requires": [], "description": ""}');
CREATE TABLE toolchain (
	digest VARCHAR(64) NOT NULL, 
	body JSON NOT NULL, 
	PRIMARY KEY (digest)
);
INSERT INTO "toolchain" VALUES('a84a3eb7591621d8420fd5ae9dc2debbb1f0b5f924a6adb8c3a0d911b2733664','{"llmbuild": "0.1.0", "importer": "importer", "compiler": "3.13.0", "runtime": "3.13.0"}');
CREATE TABLE trial (
	scope VARCHAR(64) NOT NULL, 
	point VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	variant VARCHAR(64) NOT NULL, 
	failure INTEGER, 
	seconds DOUBLE NOT NULL, 
	created_at VARCHAR NOT NULL, 
	PRIMARY KEY (scope, point), 
	FOREIGN KEY(failure) REFERENCES failure (id), 
	FOREIGN KEY(variant) REFERENCES variant (digest)
);
INSERT INTO "trial" VALUES('d4fd10f8cd48989afe21371f7d16813c5449b825bf4c7ef26c4ea75f44aed07f','cf3ff51555d2e6e4b4b310ed59f991c38dc26a95c629ac90d657d823cb986864',0,'4780acad8be3bd480b8aeda2752f1bb0746a2156a7a157cf299ba9080923df18',NULL,0.1,'2026-11-21T16:42:08.346+00:00');
INSERT INTO "trial" VALUES('d4fd10f8cd48989afe21371f7d16813c5449b825bf4c7ef26c4ea75f44aed07f','934c4c52bf003d1d14c8505c84a4c57d511c7dd837c0828a317bdc89e6964367',1,'cb348ecaa12e0fb9d3a24f740e9ab11b8f6876014741ef9a6ed36691ea7652c6',NULL,0.1,'2026-11-21T16:42:08.369+00:00');
INSERT INTO "trial" VALUES('d4fd10f8cd48989afe21371f7d16813c5449b825bf4c7ef26c4ea75f44aed07f','8c4920802a20a1885a3f183763da74f3b9ce1d9cbb0da76f041f9c84c2a6ae27',2,'dfecfc69d04e3cb7c16b1edb30db29ef7b7aa595ee91ccd37440b4fd5d1d095f',NULL,0.1,'2026-11-21T16:42:08.381+00:00');
CREATE TABLE variant (
	digest VARCHAR(64) NOT NULL, 
	program VARCHAR(64), 
	target VARCHAR(64) NOT NULL, 
	toolchain VARCHAR(64) NOT NULL, 
	artifact VARCHAR(64), 
	tokenizer VARCHAR(64), 
	lineage VARCHAR(64) NOT NULL, 
	point JSON NOT NULL, 
	is_default BOOLEAN NOT NULL, 
	created_at VARCHAR NOT NULL, chat VARCHAR(64), 
	PRIMARY KEY (digest), 
	FOREIGN KEY(artifact) REFERENCES artifact (digest), 
	FOREIGN KEY(program) REFERENCES program (digest), 
	FOREIGN KEY(target) REFERENCES target (digest), 
	FOREIGN KEY(toolchain) REFERENCES toolchain (digest)
);
INSERT INTO "variant" VALUES('4780acad8be3bd480b8aeda2752f1bb0746a2156a7a157cf299ba9080923df18','f64692443333545038b5e1df1541a604160341c1d61249954808a4f501b80742','437213080877549397871d8446c0c7d6da695c585903548a575b7220fe34da6a','a84a3eb7591621d8420fd5ae9dc2debbb1f0b5f924a6adb8c3a0d911b2733664','13b33d08726b2e90e46c5f83555c13167cfa94fcf3b549eb17d2f2094f0d660f','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','d4fd10f8cd48989afe21371f7d16813c5449b825bf4c7ef26c4ea75f44aed07f','{"driver": "local-sync", "name": "default", "workers": 1}',1,'2026-11-21T16:42:08.334+00:00',NULL);
INSERT INTO "variant" VALUES('cb348ecaa12e0fb9d3a24f740e9ab11b8f6876014741ef9a6ed36691ea7652c6','f64692443333545038b5e1df1541a604160341c1d61249954808a4f501b80742','437213080877549397871d8446c0c7d6da695c585903548a575b7220fe34da6a','a84a3eb7591621d8420fd5ae9dc2debbb1f0b5f924a6adb8c3a0d911b2733664','926f4b36e0793e2b4a74a9c9514491aa975cda42068bd51b7ca5a80746df4293','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','d4fd10f8cd48989afe21371f7d16813c5449b825bf4c7ef26c4ea75f44aed07f','{"driver": "local-sync", "name": "fast", "workers": 1}',0,'2026-11-21T16:42:08.367+00:00',NULL);
INSERT INTO "variant" VALUES('dfecfc69d04e3cb7c16b1edb30db29ef7b7aa595ee91ccd37440b4fd5d1d095f','2b2192a2f1dd63883ed795efff02517d865db84c7d4c564011b4139c961dafbb','437213080877549397871d8446c0c7d6da695c585903548a575b7220fe34da6a','a84a3eb7591621d8420fd5ae9dc2debbb1f0b5f924a6adb8c3a0d911b2733664','41b72e78d363b09d8089106a46e753ee7e93f7d2af014378e3fea46277b611c6','44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a','d4fd10f8cd48989afe21371f7d16813c5449b825bf4c7ef26c4ea75f44aed07f','{"driver": "local-sync", "name": "small", "workers": 1}',0,'2026-11-21T16:42:08.379+00:00',NULL);
CREATE INDEX ix_failure_variant ON failure (variant);
CREATE INDEX ix_target_name ON target (name);
CREATE INDEX ix_compile_artifact ON compile (artifact);
CREATE INDEX ix_variant_lineage ON variant (lineage);
CREATE INDEX ix_measurement_scope ON measurement (scope);
CREATE INDEX ix_measurement_variant ON measurement (variant);
CREATE INDEX ix_trial_variant ON trial (variant);
CREATE INDEX ix_standing_variant ON standing (variant);
CREATE INDEX standing_by_model ON standing (model, status);
CREATE VIEW failures AS
SELECT f.id AS failure, f.model AS model, f.variant AS variant, f.stage AS stage, f.reason AS reason,
       f.command AS command, f.log AS log, f.lasting AS lasting, f.created_at AS created_at, v.point AS point
FROM failure f LEFT JOIN variant v ON v.digest = f.variant;
CREATE VIEW measurements AS
SELECT r.key AS measurement, r.variant AS variant, r.artifact AS artifact, m.name AS machine,
       r.machine AS machine_digest, r.workload AS workload, r.workload_body AS workload_body, r.protocol AS protocol,
       r.session AS session, r.ttft_s, r.tpot_s, r.itl_p99_s, r.e2e_s, r.output_tokens_per_s,
       r.energy_j_per_token, r.energy_source, r.energy AS energy,
       r.peak_memory_bytes, r.load_s, r.quality_kl, r.quality_top1, r.quality_perplexity,
       r.dispatches_per_token, r.bandwidth_fraction, r.peak_fraction, r.operators AS operators,
       r.intervals AS intervals, r.ratios AS ratios, r.samples AS samples, r.notes AS notes,
       r.created_at AS created_at
FROM measurement r JOIN machine m ON m.digest = r.machine;
CREATE INDEX measurement_by_key ON measurement ("key", tpot_s, ttft_s, itl_p99_s, e2e_s, output_tokens_per_s, energy_j_per_token, peak_memory_bytes, load_s, quality_kl, quality_top1);
CREATE VIEW variants AS
SELECT s.variant AS variant, s.model AS model, t.name AS target, m.name AS machine, s.workload AS workload,
       s.status AS status, v.is_default AS "default",
       r.ttft_s, r.tpot_s, r.itl_p99_s, r.e2e_s, r.output_tokens_per_s,
       r.energy_j_per_token, r.energy_source, r.energy AS energy,
       r.peak_memory_bytes, a.size_bytes AS artifact_bytes, p.parameter_bytes AS parameter_bytes, r.load_s,
       r.quality_kl, r.quality_top1, r.quality_perplexity,
       r.dispatches_per_token, r.bandwidth_fraction, r.peak_fraction, r.operators AS operators,
       v.point AS point, v.artifact AS artifact, v.toolchain AS toolchain,
       s.confidence AS confidence, s.reason AS reason,
       s.machine AS machine_digest, s.target AS target_digest, t.body AS target_body,
       p.digest AS program, p.parameters AS parameters, p.abi AS abi,
       CASE WHEN s.source IS NULL THEN v.tokenizer ELSE s.tokenizer END AS tokenizer,
       a.runtime AS runtime, r.ratios AS ratios, r.intervals AS intervals, r.notes AS notes,
       CASE WHEN s.source IS NULL THEN v.chat ELSE s.chat END AS chat
FROM standing s
JOIN variant v ON v.digest = s.variant
JOIN target t ON t.digest = s.target
JOIN machine m ON m.digest = s.machine
LEFT JOIN measurement r ON r.key = s.measurement
LEFT JOIN artifact a ON a.digest = v.artifact
LEFT JOIN program p ON p.digest = v.program;
CREATE VIEW front AS SELECT * FROM variants WHERE status IN ('pareto', 'undecided');
CREATE INDEX load_curve_by_variant ON load_curve (variant);
CREATE VIEW load_curves AS
SELECT c.key AS load_curve, c.variant AS variant,
       (SELECT min(s.model) FROM standing s WHERE s.variant = c.variant) AS model,
       t.name AS target, m.name AS machine, c.machine AS machine_digest, c.artifact AS artifact,
       c.driver, c.workers, c.context, c.decodes_most, c.prompt_most,
       c.decode_s, c.decodes_s, c.prompt_s, c.decode_j, c.decodes_j, c.prompt_j, c.energy_source,
       c.error_p95, c.held_out, c.turn_s, c.row_s, c.body AS body, c.protocol, c.created_at
FROM load_curve c
JOIN machine m ON m.digest = c.machine
JOIN variant v ON v.digest = c.variant
JOIN target t ON t.digest = v.target;
COMMIT;
